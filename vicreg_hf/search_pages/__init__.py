"""Pages of images beside those most like them: an HTML file, a local app, a Space of the Hub."""
