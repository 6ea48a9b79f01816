"""Reports: console, JSON and images. They read results and decide nothing."""
