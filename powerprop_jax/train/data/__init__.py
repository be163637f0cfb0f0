"""Small data sets, which fit on the device."""
