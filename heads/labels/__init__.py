"""What the embeddings say of labels: nearest labels, likely label errors, duplicates, outliers."""
