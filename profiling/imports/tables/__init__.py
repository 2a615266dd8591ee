"""Tables of counts by layer and expert, in whatever form people keep them; nothing in a file is executed."""
