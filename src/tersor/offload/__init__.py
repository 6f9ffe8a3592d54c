"""Which weights come from the host or a disk, when, and into which buffer? (Endor, arXiv 2406.11674.)"""
