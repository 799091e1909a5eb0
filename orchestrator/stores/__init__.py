"""One file for each kind of storage, under storage.py: local folders, S3, and gs:// and az://."""
