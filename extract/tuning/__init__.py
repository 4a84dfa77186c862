"""Backbones of one's own: adapters for a pretrained one (`mmc tune`)."""
