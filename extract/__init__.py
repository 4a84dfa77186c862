"""From a source of samples to a filled store."""
