"""Backbones of one's own from the start: masked multimodal pretraining (`mmc pretrain`)."""
