package container

import (
	"fmt"
	"os"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"

	"github.com/longhouse-go/longhouse/core/config"
)

// newLogger makes the node's logger: for people on a terminal, else JSON. It
// does not sample: every line counts.
func newLogger(cfg *config.Config, p Parts) (*zap.Logger, error) {
	if p.Logger != nil {
		return p.Logger, nil
	}
	level := zapcore.InfoLevel
	if cfg.Log.Level != "" {
		if err := level.Set(cfg.Log.Level); err != nil {
			return nil, fmt.Errorf("log.level: %q is none of debug, info, warn, error", cfg.Log.Level)
		}
	}
	console := cfg.Log.Format == "console" || cfg.Log.Format != "json" && term.IsTerminal(int(os.Stderr.Fd()))
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.ISO8601TimeEncoder
	encoder := zapcore.NewJSONEncoder(enc)
	if console {
		enc.EncodeLevel = zapcore.CapitalLevelEncoder
		enc.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
		encoder = zapcore.NewConsoleEncoder(enc)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(os.Stderr), level)), nil
}
