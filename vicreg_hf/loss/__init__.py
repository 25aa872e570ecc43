"""The VICReg loss: `vicreg` for two views, `multi_view` for more, `regularizers` for single terms,
`local` for feature maps.

`checks` refuses what none of them takes, `autograd` adds the terms up and differentiates them, and
`covariance` holds the two forms of the covariance term.
"""
