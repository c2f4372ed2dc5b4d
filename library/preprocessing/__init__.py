"""From a folder of pictures to captions, tags and metadata."""
