"""The task families that come with the package: one file per family, called like it."""
