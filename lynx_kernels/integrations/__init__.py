"""Our kernels in models of other libraries. ``lynx_kernels`` itself imports nothing from here."""
