"""The VICReg loss: `vicreg_loss` for two views, `multi_view_loss` for more, its single terms."""
