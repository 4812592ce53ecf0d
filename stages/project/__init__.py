"""params.yaml as a whole: read, checked, and its mistakes told."""
