"""Records of conversations about pictures, and the batches made of them."""
