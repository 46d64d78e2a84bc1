"""symgeo."""
