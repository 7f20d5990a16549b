//! Static sites: the built page and packs side by side, and a loopback server for them.
