package encrypt

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/secret"
)

// TestVectors decrypts what Tomcat 10.1.60 has encrypted, at the time when it
// was.
func TestVectors(t *testing.T) {
	data, err := os.ReadFile("testdata/encrypt.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []struct {
			Name   string
			Config struct {
				EncryptionAlgorithm string
				EncryptionKeyHex    string
			}
			Input struct {
				Options   uint32
				Timestamp int64
				BodyHex   string
			}
			Output []struct {
				UniqueIDHex string
				BodyHex     string
			}
		}
	}
	if err := json.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Vectors) < 8 {
		t.Fatalf("%d vectors", len(file.Vectors))
	}
	for _, v := range file.Vectors {
		synctest.Test(t, func(t *testing.T) {
			time.Sleep(time.Until(time.UnixMilli(v.Input.Timestamp)))
			c := Defaults
			c.Dialect, c.Algorithm, c.Key = DialectTomcat58, v.Config.EncryptionAlgorithm, secret.New(v.Config.EncryptionKeyHex)
			n := newNode(t, 1, c)
			body, err := hex.DecodeString(v.Output[0].BodyHex)
			if err != nil {
				t.Fatal(err)
			}
			m := &channel.Message{ID: channel.NewUniqueID(), From: channeltest.Member(2), Options: channel.Options(v.Input.Options), Time: v.Input.Timestamp, Body: body}
			if r := n.take(t, m); r != "" {
				t.Fatalf("%s: %s", v.Name, r)
			}
			if got := hex.EncodeToString(n.last().Body); got != v.Input.BodyHex || n.last().Time != v.Input.Timestamp {
				t.Errorf("%s: got %s at %d", v.Name, got, n.last().Time)
			}
			if r := n.take(t, m); r != replayed {
				t.Errorf("%s, again: %q", v.Name, r)
			}
		})
	}
}

// TestAlgorithms accepts what Tomcat accepts, of its 32 pairs of mode and
// padding, and nothing else.
func TestAlgorithms(t *testing.T) {
	accepted := map[string]bool{
		"AES/GCM/NoPadding": true, "AES/CBC/PKCS5Padding": true, "AES/CFB/PKCS5Padding": true, "AES/OFB/PKCS5Padding": true,
	}
	n := 0
	for _, m := range []string{"NONE", "CBC", "CCM", "CFB", "CFB8", "CFB128", "CTR", "CTS", "ECB", "GCM", "KW", "KWP", "OFB", "OFB8", "OFB128", "PCBC"} {
		for _, p := range []string{"NoPadding", "PKCS5Padding"} {
			a := "AES/" + m + "/" + p
			c := tomcat1(DialectTomcat58, a, keyA[:32])
			if err := c.Validate(); (err == nil) != accepted[a] {
				t.Errorf("%s: %v", a, err)
			}
			n++
		}
	}
	if n != 32 {
		t.Errorf("%d pairs", n)
	}
	for _, a := range []string{"DES/CBC/PKCS5Padding", "AES/GCM", "AES/GCM/NoPadding/x", "AES/CBC/ISO10126Padding", "AES//NoPadding", "/"} {
		c := tomcat1(DialectTomcat58, a, keyA[:32])
		if err := c.Validate(); err == nil {
			t.Errorf("%s is accepted", a)
		}
	}
	for _, a := range []string{"AES", "aes/gcm/nopadding"} {
		c := tomcat1(DialectTomcat58, a, keyA[:32])
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
}
