"""One trace of a model, run as often as wanted: dense, replaced, cut or watched."""
