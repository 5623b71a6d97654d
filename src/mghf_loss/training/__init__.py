"""Train your own invertible network on a folder of images: data, objective, loop."""
