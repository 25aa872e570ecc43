"""Random views of images: the draws that decide them, and the operations that make them."""
