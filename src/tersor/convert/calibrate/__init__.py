"""What do the layers of a model see of a text? Statistics block by block, and the codes that follow from them."""
