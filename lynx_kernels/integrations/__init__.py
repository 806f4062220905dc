"""Other people's models on our kernels. Nothing here is imported by ``lynx_kernels`` itself."""
