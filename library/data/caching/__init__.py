"""What is computed once: latents and text encoder outputs, in files beside the images or in a temporary one."""
