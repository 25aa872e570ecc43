"""From the cells of a column to samples: images, sounds, texts and vectors."""
