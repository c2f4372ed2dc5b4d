"""What is told of pictures in one JSON file."""
