"""The scenes world in motion: captioned clips of one shape, small enough to learn on two cores and to check by machine."""
