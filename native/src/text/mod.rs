//! Reading text files of every supported kind as documents.
