"""Pure functions on tensors: no module, no state, no configuration."""
