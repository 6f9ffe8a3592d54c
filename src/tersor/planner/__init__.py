"""Which device holds which part of a model, at what cost? A plan is made without a GPU; others read it as a value."""
