"""Records of conversations about images and videos, and the batches made of them."""
