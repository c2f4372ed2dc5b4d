"""Folders and metadata files -> the columns of a RecordTable."""
