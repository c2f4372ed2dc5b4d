"""What the user is told of the data: tables, a chart, the dataset sheet, and the metadata of trained files."""
