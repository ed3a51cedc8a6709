package bridge

import (
	"strings"
	"testing"
)

// A plugin without options still hears which ones it needs.
func TestDecoderWithoutOptions(t *testing.T) {
	var c struct {
		File string `yaml:"file" validate:"required"`
	}
	if err := Decoder(nil, "node.yaml:7")(&c); err == nil || !strings.Contains(err.Error(), "file: is missing") {
		t.Errorf("got %v", err)
	}
	if err := Decoder(nil, "")(new(struct{ Level int })); err != nil {
		t.Error(err)
	}
}
