"""Exchange with other tools' file formats: one file per format."""
