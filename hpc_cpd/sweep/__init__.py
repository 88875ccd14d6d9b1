"""Many runs from one file: a grid of rows and seeds, each an ordinary run of the ordinary launcher."""
