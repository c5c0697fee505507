"""What every kernel must equal: plain torch, on any device."""
