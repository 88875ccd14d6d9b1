"""Where teachers come from when they are not trained in the run: one file per source."""
