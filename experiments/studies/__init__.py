"""What studies compute; the programs of the same names run and show them."""
