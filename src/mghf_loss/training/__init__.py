"""Train your own invertible network on a folder, a data set or a stream of images, and evaluate it."""
