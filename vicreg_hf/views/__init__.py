"""Random views of images: what is drawn, and the operations that make a view of it."""
