// Package wire is the byte format of Apache Tribes: member records (which are
// heartbeats too), frames, channel packages and acknowledgements. All of it is
// pure functions on byte slices.
//
//	frame    "FLT2002" · i32 length · payload · "TLF2003"
//	payload  acknowledgement (3 bytes), or a channel package:
//	         u32 options · i64 time · counted id · counted member record · counted body
//	record   "TRIBES-B" 1 0 · i32 length · body · "TRIBES-E" 1 0
//
// All integers are big endian; "counted" is an i32 length and that many bytes.
// Every length is checked against what is there before anything is allocated
// or sliced. Bytes that break the format are an [*Error] that names the offence,
// so that callers can count refusals by kind.
//
// Stricter than Tribes, on purpose: message ids have 16 bytes, hosts 4 or 16,
// inner lengths must add up exactly, records fit in [MaxMember] bytes, and the
// first framing error ends a stream.
//
// The package imports package channel and the standard library only. It must
// not do I/O, start goroutines, log or read the clock.
package wire
