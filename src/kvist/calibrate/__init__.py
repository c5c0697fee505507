"""What is learned from text: thresholds, tables, sensitivity."""
