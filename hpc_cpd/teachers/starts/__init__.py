"""What a teacher starts from: one file per kind of start."""
