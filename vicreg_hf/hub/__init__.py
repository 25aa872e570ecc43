"""The published format: files, verification, model card, and the requests to the Hub."""
