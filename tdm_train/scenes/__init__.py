"""The bundled world: captioned scenes of simple shapes, small enough to learn on two cores and to check by machine."""
