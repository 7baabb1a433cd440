"""How a patch becomes a tensor; a copy of this package travels to the device."""
