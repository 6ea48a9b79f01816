"""Reports: console, JSON and pictures. They read results and decide nothing."""
