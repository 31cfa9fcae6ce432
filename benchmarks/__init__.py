"""What the README's times and its table of faults are made from, a module a measurement."""
