"""What is measured, drawn and said while a run trains."""
