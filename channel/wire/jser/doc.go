// Package jser reads and writes Java object streams as data: the part of the
// Java Object Serialization Stream Protocol that Apache Tribes and Tomcat's
// cluster put into message bodies, for a listed set of classes.
//
//	value     Go type
//	null      nil
//	boxes     bool int8 int16 Char int32 int64 float32 float64
//	String    string (a lone surrogate stays as its three bytes)
//	arrays    []byte []bool []int16 []Char []int32 []int64 []float32 []float64 *Array
//	java.*    *List *Set *Map Date UUID *big.Int *Decimal *Locale *StringBuffer Enum
//	Tribes    *RPCMessage *ByteMessage *Member *MemberMessage *MapMessage
//	Tomcat    *SessionMessage *DeltaSession *FileMessage *UndeployMessage
//	          *SingleSignOnEntry *SingleSignOnKey *SingleSignOnListener *Principal
//	other     refused, or *Object (see [Limits].KeepUnlisted)
//
// Nothing here looks a class up, makes an instance of one or runs any code:
// a class is a name, a number and a list of fields. Proxies, class objects,
// exceptions and loops are always refused. Every length is checked against the
// bytes that are there; depth, and the size of a value with all its references
// written out, are bounded by [Limits]. Any serialVersionUID is accepted; which
// ones are written is said by a [Dialect].
//
// Sharing: Java writes an object once and then refers to it. Pointers, slices
// and strings that are the same memory are one object here; strings of the same
// text elsewhere in memory are two, as in Java. Booleans, bytes and whole
// numbers from -128 to 127 are shared, as the JVM caches them. Decoding keeps
// all that, so that a stream is encoded again to the same bytes.
//
// The package imports channel, channel/wire and the standard library only. It
// must not do I/O, start goroutines, log or read the clock.
package jser
