"""Pictures, tables and one HTML page from the files of a run. Needs no torch and no network."""
